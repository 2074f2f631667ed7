"""How does aiotime compare with what people would otherwise use?"""
