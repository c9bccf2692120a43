"""inspect, verify and head: looking at a store."""
