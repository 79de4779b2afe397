"""The small process with priority that enforces CPU shares on one host.

It measures what every VM used, computes what each is entitled to (:mod:`corral.scheduler.shares`) and has the kernel
divide each core by these entitlements; threads that no packing of the cores can serve exactly are steered between cores
every 20 ms. It knows no store and no engine: the agent tells it which VMs there are (:mod:`corral.governor.protocol`)
over its standard input, and it answers with a report a second. Whenever it ends, VMs run on with weights that are fair
by themselves; nothing it sets can starve a VM.
"""
