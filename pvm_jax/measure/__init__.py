"""What a model sees over a long answer: six measurements as arrays, a file each, and the report
that shows them.

reading      conversations -> batches; what a measurement keeps of a piece of one dilution,
accuracy, lens, looked, ablations, cost      the measurements: functions that return arrays
intervals, sections, captions, figures, report         from arrays to means, figures and the page
command      `python -m pvm_jax measure`
"""
