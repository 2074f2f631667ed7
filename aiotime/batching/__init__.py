"""Several frames as one job: joined, computed, taken apart again.

    joining     payloads to one and back; what may be joined (also for `aiotime.dynamic`, whose calls do the same)
    layout      the same for the pieces of a model, whose values are not all rows
    desk        the frames that wait at one stage, and what becomes of them
    agenda      which of the stages on one device stream runs next
    gathering   a device stream at which frames wait for company

`aiotime.dynamic` joins *calls* on the loop; a linear pipeline joins *frames* where its device stream runs them, since
they reach a stage before their values do.
"""
