"""Profile records -> cost model -> placement. Decides; measures nothing itself."""
