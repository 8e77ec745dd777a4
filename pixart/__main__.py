from pixart.command import start

start()
