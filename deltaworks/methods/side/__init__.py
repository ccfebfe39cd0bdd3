"""Side networks: a small model beside the base that reads its hidden states and makes the prediction.

Nothing is back-propagated through the base, so its activations need not be kept. The pages differ in what the side
network is made of and in how it reads.
"""
