"""
Decisions, without anything that acts: no clock, no socket, no log, no await.
"""
