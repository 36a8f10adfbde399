"""Recipes: functions that return a full job."""
