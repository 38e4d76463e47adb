"""Drills: a real daemon process follows simulated engines through a seeded schedule of faults, and is then held to the
truth.

`faults` names what can go wrong, `plan` makes a schedule of a seed, `target` the configuration that is drilled,
`daemon` the process, `lies` what a broken replay socket answers. `stage` carries a schedule out, `oracle` compares,
`evidence` keeps what reproduces a divergence.

After the last fault each worker must be equal to what its engine really holds, or be marked untrusted. Then one of the
faults must excuse it, and the index may claim less than the truth but nothing else.
"""
