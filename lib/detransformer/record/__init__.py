"""What results are held against: the papers' values, and the one rule that judges ours."""
