"""Our log-probs and entropies inside other trainers: one module each, with patch() and unpatch().

    import rloo_fast.integrations.trl as fast_trl

    with fast_trl.patched():  # or patch() ... unpatch()
        trl.RLOOTrainer(...).train()

`trl`, `openrlhf` and `verl` of this package replace functions of the package of that name by
functions of the same names and signatures. Nothing is imported or changed before patch().
"""
