"""The `everstep` command. Everything it does goes through `everstep.Client`."""
