"""The door of a pipeline: pull from a source, inspect what came, admit it within the budget.

source ──▶ pull (pull.py) ──▶ inspect (inspection.py) ──▶ admit (door.py) ──▶ stage 0
"""
