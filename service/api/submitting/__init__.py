"""From the bytes of a submission to a stored job: the document, its components, the fleet, the visit."""
