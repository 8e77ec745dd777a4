"""The calls over HTTP that are OpenAI's and our own, and the settings that all calls share."""
