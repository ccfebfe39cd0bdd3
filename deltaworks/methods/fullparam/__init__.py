"""Training the base's own parameters.

Nothing is added: the change is the difference between the parameters before and after, and the artifact holds the
parameters that trained. The pages differ in which parameters move at which step, and in how the step is made.
"""
