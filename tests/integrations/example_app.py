import hmac
import os
import secrets
from collections.abc import AsyncIterator
from functools import cache
from typing import Annotated

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.responses import StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from openai import AsyncOpenAI, AsyncStream
from openai.types.chat import ChatCompletionChunk
from pydantic import BaseModel

from quotalimit import configure, rate_limited, store_from_url, token_budget
from quotalimit.integrations.fastapi import client_address, install

configure(store=store_from_url(os.environ.get("QUOTALIMIT_STORE", "memory://")))  # redis://… for several workers


@rate_limited("100/minute", key=client_address(), name="by-address")
async def any_request(request: Request) -> None:
    """Every endpoint depends on this."""


app = FastAPI(dependencies=[Depends(any_request)])
install(app)

PASSWORDS = {"alice": "wonderland", "bob": "builder"}  # a real service keeps hashes
SECRET = os.environ.get("SECRET") or secrets.token_hex()  # all workers must have the same


class Login(BaseModel):
    user: str
    password: str


class Question(BaseModel):
    prompt: str


def token_of(user: str) -> str:
    """Whoever shows this is the user; a real service lets it expire."""
    return f"{user}:{hmac.digest(SECRET.encode(), user.encode(), 'sha256').hex()}"


@app.post("/login")
async def login(login: Login) -> dict[str, str]:
    if not secrets.compare_digest(PASSWORDS.get(login.user, ""), login.password) or not login.password:
        raise HTTPException(401, "wrong user or password")
    return {"token": token_of(login.user)}


def session(bearer: Annotated[HTTPAuthorizationCredentials, Depends(HTTPBearer())]) -> str:
    user = bearer.credentials.partition(":")[0]
    if not secrets.compare_digest(bearer.credentials.encode(), token_of(user).encode()):
        raise HTTPException(401, "log in first")
    return user


@rate_limited("20/minute", key="user", name="by-user")
async def signed_in(user: Annotated[str, Depends(session)]) -> str:
    return user


User = Annotated[str, Depends(signed_in)]


@app.get("/me")
async def me(user: User) -> dict[str, str]:
    return {"user": user}


@cache
def model() -> AsyncOpenAI:
    return AsyncOpenAI(max_retries=0)


@token_budget("10_000/day", key="user", name="tokens")
async def ask(user: str, prompt: str) -> AsyncStream[ChatCompletionChunk]:
    return await model().chat.completions.create(
        model="gpt-4o",
        messages=[{"role": "user", "content": prompt}],
        stream=True,
        stream_options={"include_usage": True},
    )


@app.post("/chat")
async def chat(user: User, question: Question) -> StreamingResponse:
    answer = await ask(user, question.prompt)  # a 429 is raised here, before the first byte

    async def words() -> AsyncIterator[str]:
        async with answer:  # settled when it ends, and when the client goes away
            async for chunk in answer:
                if chunk.choices:
                    yield chunk.choices[0].delta.content or ""

    return StreamingResponse(words(), media_type="text/plain")
