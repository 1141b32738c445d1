"""What there is to run jobs: workers and what they can do, and the components that they offer."""
