"""What goes out: views, their spelling on the wire, conditional and partial answers, errors, OpenAPI.

No SQL and no route here.
"""
