"""Drivers of other serving engines; each runs where its engine is installed."""
