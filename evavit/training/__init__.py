"""What train.py and validate.py are made of: settings and their checks, data, what is built, the loop, checkpoints."""
