"""An HTTP server on the engine, in the form of OpenAI's API. It alone imports FastAPI and uvicorn."""
