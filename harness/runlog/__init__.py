"""What a run leaves behind: the format of its directory and of its log, one writer and one reader.

Trainer, mirrors, command line and dashboard meet here only. Nothing here imports torch.
"""
