"""What comes in: keys, bodies, parameters, cursors and the request log. Nothing here answers a route."""
