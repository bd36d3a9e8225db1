-- The shop's own tables. They live in the file of unlost, so that a row, the events and the mark "handled" are one commit.
create table if not exists payment (
    order_id text not null, customer_id text not null, cents integer not null, state text not null
);

create table if not exists settlement (
    day text primary key, cents integer not null, orders integer not null
);

-- Every settled order in the sequence of settling. Nothing here is unique on purpose:
-- an order that was settled twice must be seen, not refused.
create table if not exists settled_order (
    number integer primary key, order_id text not null, customer_id text not null, day text not null, cents integer not null
);
