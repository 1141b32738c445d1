"""The process of one job: it takes its order, trains, reports and says how it ended."""
