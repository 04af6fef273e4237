"""What a step keeps in memory: rematerialisation policies."""
