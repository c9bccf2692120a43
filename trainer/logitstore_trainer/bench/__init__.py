"""`logitstore bench`: what storing costs, how fast a store is read, how fast the loss is; each with a report.

storage.py, throughput.py and kernels.py are the three commands, each with add_arguments(parser) and run(args).
"""
