"""The two example apps, run as their READMEs say and used in a real browser."""
