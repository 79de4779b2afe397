"""The whole control plane on a fake world under virtual time: loop, world, cluster, faults, checkers."""
