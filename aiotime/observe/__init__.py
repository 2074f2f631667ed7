"""What the pipeline shows of itself: meters, statistics, traces, log events. Imports no other room but errors."""
