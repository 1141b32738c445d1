"""Routes that tell how a job goes: its summary, its step record, its events, and the stream of all."""
