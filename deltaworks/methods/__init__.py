"""The pages: one file a method, one folder a family. Each folder's docstring gives the idea its pages share."""
