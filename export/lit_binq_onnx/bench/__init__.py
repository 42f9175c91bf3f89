"""`litbinq bench`: how fast, beside what a user would pick instead."""
