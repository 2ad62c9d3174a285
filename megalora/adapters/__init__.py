"""The adapters: their parameters and shards, what travels around each base, and how they run."""
