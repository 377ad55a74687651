"""What `benchmarks/stream.py` is made of.

`corpus`: the documents, their tokenizer, and the same documents in the format that each contender reads best; `peers`
and `ours`: the contenders, each an iterator of batches; `turns`: the process that runs one of them on command;
`tree`: that process and its workers from outside: start, freeze, memory, CPU time; `report`: figures to bars and
tables.
"""
