"""Added context: positions, keys and values that a frozen base reads beside the text.

The pages differ in where the context enters (at the input, or in every attention), in what makes it while it trains,
and in whether it depends on the text.
"""
