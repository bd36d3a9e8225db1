"""A shop: the web request writes the order and its event in one transaction; a service writes the invoice.

unlost store migrate && unlost run shop        the tables, and the service
uvicorn shop:web                               the web app
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from pydantic import BaseModel
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from unlost import App, Context, Event, Service


class OrderPlaced(Event, key="order_id"):
    order_id: str
    total_cents: int


class Base(DeclarativeBase): ...


class Order(Base):
    __tablename__ = "shop_order"
    id: Mapped[str] = mapped_column(primary_key=True)
    total_cents: Mapped[int]


class Invoice(Base):
    __tablename__ = "shop_invoice"
    order_id: Mapped[str] = mapped_column(primary_key=True)
    total_cents: Mapped[int]


engine = create_async_engine(os.environ["UNLOST_STORE"].replace("postgresql:", "postgresql+psycopg:"))
sessions = async_sessionmaker(engine)
billing = Service("billing", guarantee="effectively-once")


@billing.on(OrderPlaced)
async def send_invoice(order: OrderPlaced, ctx: Context) -> None:
    async with sessions() as session, ctx.transaction(session):  # the invoice and the mark "handled": one commit
        session.add(Invoice(order_id=order.order_id, total_cents=order.total_cents))


app = App(billing, name="shop", schema="schema.sql")


class NewOrder(BaseModel):
    total_cents: int


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    yield
    await engine.dispose()


web = FastAPI(lifespan=lifespan)


@web.put("/orders/{order_id}", status_code=202)
async def place_order(order_id: str, new: NewOrder) -> dict[str, str]:
    async with sessions.begin() as session, app.outbox(session) as outbox:  # the order and its event: one commit
        await session.merge(Order(id=order_id, total_cents=new.total_cents))
        outbox.publish(OrderPlaced(order_id=order_id, total_cents=new.total_cents), id=f"{order_id}-placed")
    return {"order_id": order_id}


@web.get("/orders/{order_id}/invoice")
async def invoice(order_id: str) -> int | None:
    async with sessions() as session:
        found = await session.get(Invoice, order_id)
        return None if found is None else found.total_cents
