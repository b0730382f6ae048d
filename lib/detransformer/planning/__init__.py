"""Profile records -> cost model -> placement. Decides, and measures nothing itself."""
