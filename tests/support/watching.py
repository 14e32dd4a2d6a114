"""An observer that notes the layers of a run, and stops it where a test says."""

from compress.observer import Observer


class Watch(Observer):
    """Notes the layers that are started, and stops the run at a layer, a module or a stage."""

    def __init__(self, stop: int | str | None = None):
        self.stop, self.started = stop, []

    def stage(self, name):
        self._reached(name)

    def layers(self, done, total):
        if done < total:
            self.started.append(done)
        self._reached(done)

    def module(self, name, facts):
        self._reached(name)

    def _reached(self, place):
        if place == self.stop:
            raise KeyboardInterrupt
