"""Sources, token stores, splits, packing and the token ledger."""
