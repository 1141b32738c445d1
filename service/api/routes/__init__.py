"""One file of routes per resource: from the request to a store function and back, and nothing else.

What belongs to one job is in `jobs` and `progress`; here is what does not.
"""
