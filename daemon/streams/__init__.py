"""What a sequence number means. Pure: fed with messages and times, answers with verdicts.

The publisher counts its messages from 0 in each of its lives and names neither its life nor itself. So a number alone
proves nothing: after a start, a reconnection, a gap or a number that goes backwards, the stream asks the replay socket
for everything from the *last applied* number on. The first answer must be that very message, by its fingerprint. Then
what follows is what was missed. Anything else is another life of the engine, or a hole.

    CONNECTING --connected--> REPLAYING --end of replay, all contiguous--> LIVE
         ^                        ^                                          |
         |                        +--- gap, number going backwards, probe ---+
         +--------------------------- disconnected --------------------------+

While a replay runs, live messages are held: a store that the replay brings can never undo a removal that came live.
"""
