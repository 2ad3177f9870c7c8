"""Where slot k comes from: slot -> (source, epoch, instance) -> (shard, offset), computed in O(1), both ways.

    slot k --Permutation("order")--> g --(source, epoch, rank)--> Permutation("source", name) --> instance --> shard, offset
    pool q --Permutation("pool")---> (source, rank) ------------> the same instances, those that training never sees

A worked example: 10 instances in one source, a pool of 2. The keyed permutation of the source lists the instances as, say,
7 2 | 5 0 9 1 3 8 6 4. The first two are the pool; the other eight are what training may see, once an epoch. A
second permutation over all (source, epoch, rank) triples gives the order of slots. Nothing is stored: both directions are arithmetic.

That is the order `keyed`. The order `olmo` replays AI2's shuffle instead, from a file in the manifest: entry k is the instance in slot k.
"""
