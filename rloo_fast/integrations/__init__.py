"""Another trainer's package in, the same package with our log-probs and entropies out.

    import rloo_fast.integrations.trl as fast_trl

    with fast_trl.patched():  # or patch() ... unpatch()
        trl.RLOOTrainer(...).train()

`trl`, `openrlhf` and `verl` of this package replace functions of the package of that name by
functions of the same names and signatures. patch() replaces, unpatch() puts back; before patch()
nothing is imported or changed.
"""
