"""Remove weights: scores, schedules, masks and the methods made of them."""
