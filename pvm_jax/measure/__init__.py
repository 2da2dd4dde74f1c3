"""What a model sees over a long answer: measurements as arrays, a file each, and the report that
shows them.

reading      conversations -> batches; what a measurement keeps of a piece of one
dilution, accuracy, lens, looked, ablations,
dependency, midway, decision, evidence, cost    the measurements: functions -> arrays
pictures     the pictures of a conversation, as a person sees them and exchanged
intervals    from arrays to means and their intervals
report       from those to sections, figures and the page: `python -m pvm_jax measure`
"""
