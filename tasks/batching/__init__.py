"""What a batch consists of: its job, the requests of its rows, the shards, the monitor and the publication."""
