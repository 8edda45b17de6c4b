"""Networks of the neural methods: normalizing flows and harmonizers (need the `neural` extra)."""
