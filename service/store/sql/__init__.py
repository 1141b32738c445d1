"""What every statement needs: connections and transactions, the clock, ids, upserts, the schema revision."""
