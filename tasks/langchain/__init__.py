"""LangChain classes on top of an engine."""
