"""Planning: from a model to stages on devices.

    trace.py      model -> layers (capture, recording, layers)      payload.py    what a frame stands for
    traced.py     layers -> pieces (assembly, piece, twin)          untouched.py  the model stays as it is
    profile.py    what each layer costs on each device              rehearsal.py  stages side by side
    partition.py  where to cut, exactly                             plan.py       Plan, plan(); table.py prints it
"""
