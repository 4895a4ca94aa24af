"""Hostile input: what comes from outside is changed at random, and every refusal has to be one of ours.

    campaign.py   runs a target often and counts; __main__.py is its command
    mutate.py     changes JSON, safetensors and other files so that most get past the first check
    files.py      targets that read a file, which atheris chooses by what code it reaches
    arguments.py  targets that are called with arguments, which hypothesis draws
    corpus/       the files that the changes begin with, a folder a target; make_corpus.py makes them
"""
